"""The IR: programs, axes, operator rules, coupling groups, resizing, cost and verification."""
