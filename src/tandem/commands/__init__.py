"""The commands, a module each: `scripts/dpo.py` and `tandem dpo` both run `tandem.commands.dpo`."""
