"""Joints for trainers that know LoRA's config only. Each module imports its trainer, and nothing imports it."""
