"""Metrics: functions of arrays, with one statistic per item. They know no networks and no files."""
