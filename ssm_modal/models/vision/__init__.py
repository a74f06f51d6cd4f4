"""Vision Mamba in parts: config, scan orders, positions, the model, published checkpoints.

`ssm_modal.models.vision_mamba` joins them for timm; the model needs the extra `vision`, its config does not.
"""

from ssm_modal.models.vision.config import VisionMambaConfig

__all__ = ["VisionMambaConfig"]
