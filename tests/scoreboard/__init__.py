"""The scoreboard of docs/RELIABILITY.md: what is counted, what is on record, and the table."""
