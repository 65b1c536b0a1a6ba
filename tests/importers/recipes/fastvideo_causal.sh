#!/bin/bash
# Written for these tests: options of the launcher of causal students that decide a result.
MODEL_PATH="wlsaidhi/SFWan2.1-T2V-1.3B-Diffusers"
export FASTVIDEO_ATTENTION_BACKEND="FLASH_ATTN"
torchrun --nnodes 1 --nproc_per_node 8 fastvideo/training/wan_self_forcing_distillation_pipeline.py \
  --pretrained_model_name_or_path $MODEL_PATH \
  --real_score_model_path Wan-AI/Wan2.1-T2V-14B-Diffusers \
  --fake_score_model_path Wan-AI/Wan2.1-T2V-1.3B-Diffusers \
  --override_transformer_cls_name CausalWanTransformer3DModel \
  --data_path data/text_only \
  --num_gpus 8 --sp_size 1 --hsdp_replicate_dim 1 --hsdp_shard_dim 8 \
  --train_batch_size 1 --gradient_accumulation_steps 1 \
  --num_latent_t 21 --num_height 480 --num_width 832 --num_frames 81 \
  --max_train_steps 600 --learning_rate 2e-6 --weight_decay 0.01 --betas '0.0,0.999' \
  --fake_score_learning_rate 4e-7 --fake_score_betas '0.0,0.999' --max_grad_norm 10.0 \
  --dmd_denoising_steps '1000,750,500,250' --warp_denoising_step \
  --min_timestep_ratio 0.02 --real_score_guidance_scale 3.0 \
  --simulate_generator_forward --dfake_gen_update_ratio 5 --generator_update_interval 5 --num_frame_per_block 3 \
  --independent_first_frame False --same_step_across_blocks True --last_step_only False --context_noise 0
