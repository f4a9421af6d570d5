FusedSDPA = None
