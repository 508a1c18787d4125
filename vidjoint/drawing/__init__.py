"""Pictures for people: labels on videos, timelines, attention over frames."""
