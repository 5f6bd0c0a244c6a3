"""LoRA: injection (peft), snapshots, and the one file that every loader reads."""
