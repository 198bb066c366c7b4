"""What one training is: model, chat data, residual stream, defenses, LoRA, the DeepSpeed loop, sampling."""

import warnings

# In a notebook without ipywidgets tqdm complains on import. Nothing of ours shows its bars.
warnings.filterwarnings("ignore", message="IProgress not found")
