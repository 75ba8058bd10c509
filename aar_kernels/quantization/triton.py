def unavailable():
    return "not yet"
