"""Text to token ids and back: tokenizers, and chat templates that anybody may have written."""
