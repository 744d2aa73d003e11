"""Fixed prompts with fixed seeds, and what each prompt states about its image."""
