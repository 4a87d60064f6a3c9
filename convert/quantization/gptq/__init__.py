"""GPTQ of a language model, layer by layer."""
