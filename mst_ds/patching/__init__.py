"""Applies a plan to one model instance, takes it off again, and computes what a patched model computes."""

from mst_ds.patching.apply import ModelParts, apply_plan, apply_settings, decoder_of, find_parts, remove_plan

__all__ = ["ModelParts", "apply_plan", "apply_settings", "decoder_of", "find_parts", "remove_plan"]
