"""The selective scan S6 (Mamba): reference, torch and Triton forms, step, public op."""

from ssm_modal.kernels.scan.bidirectional import bidirectional_scan
from ssm_modal.kernels.scan.direction import ScanDirection
from ssm_modal.kernels.scan.hidden_row import RowCarry, selective_scan_row
from ssm_modal.kernels.scan.op import selective_scan
from ssm_modal.kernels.scan.ref import selective_scan_ref
from ssm_modal.kernels.scan.step import selective_scan_step, selective_scan_step_

__all__ = [
    "RowCarry",
    "ScanDirection",
    "bidirectional_scan",
    "selective_scan",
    "selective_scan_ref",
    "selective_scan_row",
    "selective_scan_step",
    "selective_scan_step_",
]
