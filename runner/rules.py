"""stub"""
def check(config): return []
