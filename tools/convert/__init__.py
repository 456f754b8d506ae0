"""Model files made from model files; each converter writes beside its target, then renames."""
