#!/bin/bash
# Written for these tests: each option of the launcher of bidirectional students once.
#SBATCH --nodes=8
export WANDB_API_KEY=a-secret
export FASTVIDEO_ATTENTION_BACKEND=VIDEO_SPARSE_ATTN
export TOKENIZERS_PARALLELISM=false
MODEL_PATH="Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
DATA_DIR=${DATA_DIR:-data/latents}
NUM_GPUS=64

training_args=(
  --tracker_project_name wan
  --wandb_run_name first
  --trackers wandb
  --output_dir "checkpoints/wan"
  --logging_dir logs
  --log_level info
  --max_train_steps 4000  # iterations
  --num_train_epochs 1
  --train_batch_size 1
  --train_sp_batch_size 1
  --gradient_accumulation_steps 2
  --num_latent_t 16
  --num_height 448
  --num_width 832
  --num_frames 61
  --enable_gradient_checkpointing_type "full"
  --selective_checkpointing 1.0
  --training_state_checkpointing_steps 500
  --weight_only_checkpointing_steps 500
  --checkpoints_total_limit 3
)
parallel_args=(
  --num_gpus $NUM_GPUS
  --sp_size 2
  --tp_size 1
  --hsdp_replicate_dim 8
  --hsdp_shard_dim 8
  --fsdp_sharding_strategy full
)
model_args=(
  --model_path $MODEL_PATH
  --pretrained_model_name_or_path $MODEL_PATH
  --generator_model_path $MODEL_PATH
  --real_score_model_path Wan-AI/Wan2.1-T2V-14B-Diffusers
  --fake_score_model_path $MODEL_PATH
  --init_weights_from_safetensors weights/start
  --override_transformer_cls_name WanTransformer3DModel
  --dit_model_name_or_path none
  --cache_dir cache
  --workload_type t2v
  --mode distillation
  --inference_mode False
  --trust_remote_code True
  --dit_precision fp32
  --vae_precision fp32
  --text_encoder_precisions fp32
)
dataset_args=(
  --data_path "$DATA_DIR/train"
  --dataloader_num_workers 4
  --pin_cpu_memory True
  --training_cfg_rate 0.0
  --group_frame False
  --group_resolution False
  --seed 1000
)
validation_args=(
  --log_validation
  --log_visualization
  --visualization_steps 100
  --validation_dataset_file validation.json
  --validation_steps 200
  --validation_sampling_steps "3"
  --validation_guidance_scale "6.0"
  --validation_preprocessed_path none
  --num_inference_steps 50
  --VSA_val_sparsity 0.8
  --embedded_cfg_scale 6.0
)
optimizer_args=(
  --learning_rate=1e-5
  --betas '0.0,0.999'
  --weight_decay 0.01
  --max_grad_norm 1.0
  --lr_scheduler constant_with_warmup
  --lr_warmup_steps 50
  --fake_score_learning_rate 2e-5
  --fake_score_betas '0.5,0.999'
  --fake_score_lr_scheduler constant
  --mixed_precision bf16
  --master_weight_type fp32
  --allow_tf32
  --use_ema True
  --ema_decay 0.99
  --ema_start_step 200
)
dmd_args=(
  --dmd_denoising_steps '1000,757,522'
  --warp_denoising_step True
  --flow_shift 8
  --min_timestep_ratio 0.02
  --max_timestep_ratio 0.98
  --generator_update_interval 5
  --real_score_guidance_scale 3.5
  --simulate_generator_forward False
  --dfake_gen_update_ratio 5
  --num_frame_per_block 3
  --independent_first_frame False
  --same_step_across_blocks True
  --last_step_only False
  --context_noise 0
  --VSA_sparsity 0.8
  --VSA_decay_rate 0.03
  --VSA_decay_interval_steps 50
  --VSA_cache_tile_buf False
  --lora_training False
  --lora_rank 64
  --lora_alpha 32
  --lora_target_modules to_q to_v ffn
)
unread_args=(
  --enable_gradient_masking False
  --gradient_mask_last_n_frames 21
  --validate_cache_structure False
  --multi_phased_distill_schedule none
  --pred_decay_weight 0.0
  --pred_decay_type l1
  --hunyuan_teacher_disable_cfg False
  --distill_cfg 3.0
  --scheduler_type pcm
  --linear_quadratic_threshold 0.025
  --linear_range 0.75
  --num_euler_timesteps 100
  --not_apply_cfg_solver False
  --weighting_scheme uniform
  --logit_mean 0.0
  --logit_std 1.0
  --mode_scale 1.29
  --precondition_outputs False
  --ema_update_after 0
)
speed_args=(
  --enable_torch_compile False
  --torch_compile_kwargs none
  --dit_cpu_offload False
  --dit_layerwise_offload False
  --use_fsdp_inference False
  --text_encoder_cpu_offload False
  --image_encoder_cpu_offload False
  --vae_cpu_offload False
  --vae_tiling False
  --vae_sp False
  --master_port 29500
  --distributed_executor_backend mp
  --dist_timeout 600
)
srun torchrun --nnodes $SLURM_JOB_NUM_NODES --nproc_per_node 8 \
  fastvideo/training/wan_distillation_pipeline.py \
  "${training_args[@]}" "${parallel_args[@]}" "${model_args[@]}" "${dataset_args[@]}" "${validation_args[@]}" \
  "${optimizer_args[@]}" "${dmd_args[@]}" "${unread_args[@]}" "${speed_args[@]}"
