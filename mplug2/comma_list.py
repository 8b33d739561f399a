"""A list of names in one flag, such as --splits val,test: every flag with names is read in this way."""


def comma_list(flag: str, text: str) -> list[str]:
    """The names in `text`, without the blanks around them. ValueError for an empty one, or one that is given twice."""
    names = [name.strip() for name in text.split(",")]
    for number, name in enumerate(names):
        if not name:
            raise ValueError(f"{flag}={text!r}: name {number + 1} of the list is empty; expected names with single "
                             "commas between them")
        if name in names[:number]:
            raise ValueError(f"{flag}={text!r}: {name!r} is named twice")
    return names
