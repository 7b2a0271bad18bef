"""Configuration of a STEP3-VL checkpoint for transformers; this file travels with exported folders.

Engines that know StepVLForConditionalGeneration read these fields; transformers finds the class through `auto_map`.
"""

from transformers import PretrainedConfig, Qwen3Config


class StepRoboticsVisionEncoderConfig(PretrainedConfig):
    """The Perception Encoder tower; every field comes from config.json."""

    model_type = "perception_encoder"


class StepRoboticsConfig(PretrainedConfig):
    """Tower, projector and Qwen3 decoder."""

    model_type = "step_robotics"

    def __init__(self, vision_config=None, text_config=None, **kwargs):
        self.vision_config = StepRoboticsVisionEncoderConfig(**(vision_config or {}))
        self.text_config = Qwen3Config(**(text_config or {}))
        self.hidden_size = self.text_config.hidden_size
        super().__init__(**kwargs)
