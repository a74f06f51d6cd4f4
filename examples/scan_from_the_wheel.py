"""Import the package and run a scan with the core dependencies alone; CI runs this from the wheel."""

import torch

import ssm_modal
from ssm_modal.kernels.dispatch import explain
from ssm_modal.kernels.scan import selective_scan, selective_scan_ref

torch.manual_seed(0)
u, delta, z = (torch.randn(2, 100, 24) for _ in range(3))
A, B, C = -torch.rand(24, 16) * 16, torch.randn(2, 100, 16), torch.randn(2, 100, 16)
for backend in (None, "torch"):
    out = selective_scan(u, delta, A, B, C, z=z, delta_softplus=True, backend=backend)
    ref = selective_scan_ref(u, delta, A, B, C, z=z, delta_softplus=True)
    error = float((out - ref).norm() / ref.norm())
    print(f"selective_scan, {explain('selective_scan', backend=backend)}: relative error {error:.1e}")
    assert error < 1e-5
model = ssm_modal.create_model("mamba_lm", vocab_size=16, d_model=32, n_layers=2)
logits, state = model(torch.randint(0, 16, (1, 50)))
print("ssm_modal", ssm_modal.__version__, "from", ssm_modal.__file__, "logits", tuple(logits.shape))
