"""Written for these tests: each option of FastGen's configs once. It is read, and never run."""

import fastgen.configs.methods.config_dmd2 as config_dmd2_default
from fastgen.configs.data import VideoLatentLoaderConfig
from fastgen.configs.discriminator import Discriminator_Wan_1_3B_Config
from fastgen.configs.net import Wan21_T2V_14B_Config, Wan_1_3B_Config


def create_config():
    """DMD without a discriminator, in four steps."""
    config = config_dmd2_default.create_config()
    config.model.net = Wan_1_3B_Config
    config.model.net.total_num_frames = config.model.input_shape[1]
    config.model.net.disable_grad_ckpt = False
    config.model.net.disable_efficient_attn = False
    config.model.teacher = Wan21_T2V_14B_Config
    config.model.net_optimizer.lr = 1e-5
    config.model.net_optimizer.betas = (0.0, 0.999)
    config.model.net_optimizer.weight_decay = 0.01
    config.model.net_optimizer.eps = 1e-8
    config.model.net_optimizer.optim_type = "adamw"
    config.model.net_optimizer.fused = True
    config.model.fake_score_optimizer.lr = 2e-5
    config.model.fake_score_optimizer.betas = (0.0, 0.999)
    config.model.fake_score_optimizer.weight_decay = 0.02
    config.model.fake_score_optimizer.eps = 1e-8
    config.model.fake_score_optimizer.optim_type = "adamw"
    config.model.fake_score_optimizer.fused = True
    config.model.net_scheduler.warm_up_steps = [10]
    config.model.fake_score_scheduler.warm_up_steps = [0]
    config.model.guidance_scale = 5.0
    config.model.skip_layers = None
    config.model.fake_score_net = None
    config.model.fake_score_sample_t_cfg = None
    config.model.fake_score_pred_type = "x0"
    config.model.student_update_freq = 5
    config.model.student_sample_steps = 4
    config.model.student_sample_type = "sde"
    config.model.sample_t_cfg.time_dist_type = "shifted"
    config.model.sample_t_cfg.shift = 5.0
    config.model.sample_t_cfg.min_t = 0.001
    config.model.sample_t_cfg.max_t = 0.999
    config.model.sample_t_cfg.t_list = [0.999, 0.937, 0.833, 0.624, 0.0]
    config.model.sample_t_cfg.train_p_mean = 0.0
    config.model.sample_t_cfg.train_p_std = 1.0
    config.model.sample_t_cfg.log_t_df = 0.01
    config.model.precision = "bfloat16"
    config.model.precision_fsdp = "float32"
    config.model.precision_amp = None
    config.model.precision_amp_infer = None
    config.model.precision_amp_enc = None
    config.model.input_shape = [16, 21, 60, 104]
    config.model.use_ema = False
    config.model.load_student_weights = True
    config.model.pretrained_model_path = ""
    config.model.pretrained_student_net_path = ""
    config.model.enable_preprocessors = False
    config.model.device = "cuda"
    config.model.fsdp_meta_init = True
    config.model.add_teacher_to_fsdp_dict = True
    config.model.ddp_find_unused_parameters = False
    config.model.grad_scaler_enabled = False
    config.model.gan_loss_weight_gen = 0.0
    config.model.gan_use_same_t_noise = True
    config.model.gan_r1_reg_weight = 0.0
    config.model.gan_r1_reg_alpha = 0.1
    config.model.discriminator = Discriminator_Wan_1_3B_Config
    config.model.discriminator.feature_indices = [15, 22, 29]
    config.model.discriminator_optimizer.lr = 1e-5
    config.model.discriminator_scheduler.warm_up_steps = [0]
    config.dataloader_train = VideoLatentLoaderConfig
    config.dataloader_train.batch_size = 1
    config.dataloader_train.num_workers = 2
    config.dataloader_train.datatags = ["WDS:videos"]
    config.dataloader_train.img_size = (config.model.input_shape[-1] * 8, config.model.input_shape[-2] * 8)
    config.dataloader_train.sequence_length = (config.model.input_shape[1] - 1) * 4 + 1
    config.dataloader_val = None
    config.dataloader_val.batch_size = 1
    config.trainer.max_iter = 6000
    config.trainer.save_ckpt_iter = 500
    config.trainer.logging_iter = 100
    config.trainer.validation_iter = 1000
    config.trainer.seed = 7
    config.trainer.val_seed = 1
    config.trainer.visualize_teacher = False
    config.trainer.batch_size_global = 64
    config.trainer.grad_accum_rounds = 1
    config.trainer.augment_pipe = None
    config.trainer.ddp = False
    config.trainer.fsdp = True
    config.trainer.fsdp_cpu_offload = False
    config.trainer.fsdp_min_num_params = 10_000_000
    config.trainer.fsdp_sharding_group_size = 8
    config.trainer.tf32_enabled = True
    config.trainer.cudnn.benchmark = True
    config.trainer.offload_module_in_decoding = False
    config.trainer.checkpointer.save_dir = "checkpoints"
    config.trainer.checkpointer.pretrained_ckpt_path = ""
    config.trainer.callbacks.grad_clip.grad_norm = 10.0
    config.trainer.callbacks.ema.beta = 0.99
    config.trainer.callbacks.wandb.sample_logging_iter = 500
    config.eval.num_samples = 8
    config.log_config.group = "wan_dmd2"
    return config
