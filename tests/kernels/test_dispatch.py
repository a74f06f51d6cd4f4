"""Which backend serves a call, why, and what is said where the one asked for cannot."""

from __future__ import annotations

import pytest
import torch

from ssm_modal.kernels import dispatch
from ssm_modal.kernels.dispatch import BackendError, explain, resolve, use_backend


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSM_MODAL_BACKEND", raising=False)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled CPU kernels as if they were available."""
    own = dispatch.why_not

    def available(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
        if backend == "cpu" and device.type == "cpu" and dtype == torch.float32:
            return None
        return own(op, backend, device, dtype)

    monkeypatch.setattr(dispatch, "why_not", available)


@pytest.mark.usefixtures("compiled")
def test_default_on_the_cpu() -> None:
    choice = explain("selective_scan")
    assert choice.backend == "cpu"
    assert "triton" in choice.reason


def test_other_dtypes_on_the_cpu_take_torch_and_say_so() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        choice = explain("selective_scan", dtype=dtype)
        assert choice.backend == "torch"
        assert "compiled CPU kernels take fp32, got " + str(dtype).removeprefix("torch.") in choice.reason


def test_an_op_without_the_backend() -> None:
    assert explain("lti_scan").backend == "torch"
    with pytest.raises(
        BackendError, match=r"lti_scan: backend 'triton' \(the argument backend\).*no triton form"
    ):
        explain("lti_scan", backend="triton")


@pytest.mark.usefixtures("compiled")
def test_order_of_wishes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The argument wins over use_backend, that over the environment, that over the default."""
    cpu = torch.device("cpu")
    monkeypatch.setenv("SSM_MODAL_BACKEND", "torch")
    assert explain("selective_scan").backend == "torch"
    assert "environment" in explain("selective_scan").reason
    with use_backend("cpu"):
        assert explain("selective_scan").backend == "cpu"
        assert explain("selective_scan", backend="torch").backend == "torch"
        with use_backend(None):
            assert explain("selective_scan").backend == "torch"
        assert resolve("selective_scan", cpu, torch.float32) == "cpu"
    assert resolve("selective_scan", cpu, torch.float32) == "torch"


def test_interpreted_triton_serves_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "triton_installed", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert explain("selective_scan").backend != "triton"
    assert explain("selective_scan", backend="triton").backend == "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendError, match="only under TRITON_INTERPRET=1"):
        explain("selective_scan", backend="triton")


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "triton_installed", lambda: False)
    assert explain("rms_norm", device="cuda").backend == "torch"
    with pytest.raises(BackendError, match="triton is not installed"):
        explain("rms_norm", device="cuda", backend="triton")


def test_dtypes_and_devices_a_backend_cannot_serve() -> None:
    with pytest.raises(BackendError, match="fp64 runs on backend 'torch'"):
        explain("selective_scan", device="cuda", dtype=torch.float64, backend="triton")
    with pytest.raises(BackendError, match="serve CPU tensors, these are on cuda"):
        explain("selective_scan", device="cuda", backend="cpu")
    with pytest.raises(BackendError, match="take fp32, got bfloat16"):
        explain("selective_scan", dtype=torch.bfloat16, backend="cpu")


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="backend is 'cuda', expected one of triton, cpu, torch"):
        explain("selective_scan", backend="cuda")
    with pytest.raises(ValueError, match="op is 'scan', expected one of selective_scan"):
        explain("scan")
    with pytest.raises(ValueError, match="backend is 'mps'"), use_backend("mps"):
        pass


def test_a_failed_block_restores_the_choice() -> None:
    before = explain("selective_scan").backend
    with pytest.raises(KeyError), use_backend("torch"):
        raise KeyError
    assert explain("selective_scan").backend == before
