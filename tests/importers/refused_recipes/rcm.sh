#!/bin/bash
# Written for these tests: each option of rCM's command lines once.
WORKDIR="/data/rcm"
CHECKPOINT_ROOT=${WORKDIR}/assets/checkpoints
DATASET_ROOT=${WORKDIR}/assets/datasets
export WANDB_API_KEY=a-secret
registry=registry_distill
experiment=wan2pt1_1pt3B_res480p_t2v_rCM

torchrun --nproc_per_node=8 \
    -m scripts.train --config=rcm/configs/${registry}.py -- experiment=${experiment} \
        optimizer.lr=2e-6 optimizer.weight_decay=0.01 optimizer.betas='[0.0, 0.99]' \
        model.config.optimizer_fake_score.lr=4e-7 model.config.optimizer_fake_score.weight_decay=0.01 \
        model.config.optimizer_fake_score.betas='[0.0, 0.999]' \
        model.config.teacher_ckpt=${CHECKPOINT_ROOT}/Wan2.1-T2V-14B.dcp \
        model.config.teacher_guidance=5.0 model.config.student_update_freq=10 model.config.timestep_shift=5 \
        model.config.state_t=20 model.config.state_ch=16 model.config.resolution=480p \
        model.config.precision=bfloat16 model.config.sigma_data=1.0 \
        model.config.rectified_flow_t_scaling_factor=1000.0 model.config.grad_clip=False \
        model.config.ema.enabled=True model.config.loss_scale=100.0 model.config.loss_scale_dmd=1.0 \
        model.config.loss_scale_fake_score=1.0 model.config.tangent_warmup=1000 model.config.fd_type=0 \
        model.config.fd_size=1e-4 model.config.p_G.p_mean=-0.8 model.config.p_D.p_mean=0.0 \
        model.config.sde.sigma_max=80 model.config.sde_D.sigma_max=80 model.config.sigma_max=80 \
        model.config.max_simulation_steps_fake=4 model.config.adjust_video_noise=True \
        model.config.fsdp_shard_size=4 model.config.net.sac_config.mode=block_wise \
        model.config.tokenizer.vae_pth=${CHECKPOINT_ROOT}/Wan2.1_VAE.pth \
        model.config.text_encoder_path=${CHECKPOINT_ROOT}/umt5.pth model.config.text_encoder_class=umT5 \
        model.config.neg_embed_path=${CHECKPOINT_ROOT}/negative.pt \
        trainer.max_iter=100000 trainer.logging_iter=50 trainer.callbacks.every_n_sample_reg.every_n=500 \
        checkpoint.save_iter=500 checkpoint.load_training_state=False checkpoint.strict_resume=False \
        model_parallel.context_parallel_size=1 job.name=first \
        dataloader_train.batch_size=1 dataloader_train.tar_path_pattern=${DATASET_ROOT}/shard*.tar
