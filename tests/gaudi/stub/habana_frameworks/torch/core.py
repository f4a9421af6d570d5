marked_steps = 0


def mark_step() -> None:
    global marked_steps
    marked_steps += 1
