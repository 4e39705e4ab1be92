"""The study of construction methods, docs/study.md."""
