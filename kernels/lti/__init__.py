"""The time-invariant diagonal scan with complex state (S4D): reference, torch form, step, public op."""

from ssm_modal.kernels.lti.op import lti_scan
from ssm_modal.kernels.lti.ref import lti_scan_ref
from ssm_modal.kernels.lti.step import lti_scan_step, lti_scan_step_

__all__ = ["lti_scan", "lti_scan_ref", "lti_scan_step", "lti_scan_step_"]
