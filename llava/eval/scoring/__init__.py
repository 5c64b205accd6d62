"""How answers are compared with right ones: functions that several tasks share."""
