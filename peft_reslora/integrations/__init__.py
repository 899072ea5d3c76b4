"""Joints for trainers that know LoRA's config only. A joint imports its trainer, and nothing imports the joint."""
