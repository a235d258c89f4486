"""How thresholds of early exits are found, and what is known about them afterwards."""
