"""Everything that crosses the border: Hugging Face, GGUF, tokenizers, and the native model directory."""
