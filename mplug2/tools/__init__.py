"""Commands around a run: benchmark, memory planner, report page, plots. Nothing in the package imports them."""
