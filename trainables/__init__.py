"""What one training is: model, chat data, residual stream, defenses, LoRA, the DeepSpeed loop, sampling."""
