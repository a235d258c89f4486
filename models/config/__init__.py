"""config.json and params.json, field by field."""
