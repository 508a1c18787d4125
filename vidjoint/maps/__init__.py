"""What a trained model looks at, as arrays: attention, its flow from frame to frame, and its rollout through all blocks."""
