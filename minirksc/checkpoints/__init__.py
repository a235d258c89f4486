"""Where checkpoints come from: folders, the hub, models inside packages, and GGUF files."""
