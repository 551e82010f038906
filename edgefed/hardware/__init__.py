"""What this device has and can afford. No torch at module level."""
