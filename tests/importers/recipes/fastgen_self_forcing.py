"""Written for these tests: options that FastGen has for causal students. It is read, and never run."""

import fastgen.configs.methods.config_self_forcing as config_self_forcing_default
from fastgen.configs.net import CausalWan_1_3B_Config, Wan21_T2V_14B_Config


def create_config():
    """Self-Forcing without a discriminator."""
    config = config_self_forcing_default.create_config()
    config.model.net = CausalWan_1_3B_Config
    config.model.net.chunk_size = 3
    config.model.teacher = Wan21_T2V_14B_Config
    config.model.guidance_scale = 5.0
    config.model.gan_loss_weight_gen = 0.0
    config.model.student_sample_steps = 4
    config.model.sample_t_cfg.time_dist_type = "shifted"
    config.model.sample_t_cfg.min_t = 0.001
    config.model.sample_t_cfg.max_t = 0.999
    config.model.sample_t_cfg.t_list = [0.999, 0.937, 0.833, 0.624, 0.0]
    config.model.same_step_across_blocks = True
    config.model.last_step_only = False
    config.model.context_noise = 0.1
    config.model.enable_gradient_in_rollout = True
    config.model.start_gradient_frame = 0
    config.model.precision = "bfloat16"
    config.model.precision_fsdp = "float32"
    config.model.input_shape = [16, 21, 60, 104]
    config.trainer.max_iter = 5000
    return config
