"""Programs that run many others: the quickstart's report, the methods page. Not here: anything that a run imports."""
