"""Model files: Hugging Face directories, GGUF, tokenizers, and the native model directory."""
