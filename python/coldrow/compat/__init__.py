"""Stand-ins for other libraries' classes, each built on coldrow's own; nothing is imported from those."""
