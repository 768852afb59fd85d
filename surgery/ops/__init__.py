"""The operations: for each its options (a frozen dataclass), its plan, and the pure functions it applies."""
