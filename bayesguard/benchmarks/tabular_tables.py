def report(records): return str(records[0]["values"])
