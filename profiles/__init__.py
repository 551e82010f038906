"""Device profiles: one TOML file per device, data only. Installed as ``edgefed.profiles``."""
