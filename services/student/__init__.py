"""student: keeps students."""
