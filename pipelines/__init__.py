"""Jobs, one module each: functions that return values and report events. `cli/` prints."""
