"""Presets: TOML files with the settings of `gdfq.config.Config`."""
