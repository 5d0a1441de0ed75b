"""Before RL, in order: build, pretrain, demonstrations, sft."""
