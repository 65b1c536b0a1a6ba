#!/bin/bash
# Written for these tests: the script beside fastvideo_nested.yaml, which says what is trained.
torchrun --nnodes 1 --nproc_per_node 8 fastvideo/training/wan_distillation_pipeline.py \
  --config tests/fastvideo_nested.yaml --training.loop.max_train_steps 3000
