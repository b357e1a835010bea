"""Results as tables, the published numbers beside ours."""
