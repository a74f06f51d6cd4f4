def usage_message(error, args):
    return None
