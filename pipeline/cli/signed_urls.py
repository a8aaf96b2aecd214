"""Signed URLs: what they hold beside an address stays in this process, and out of every text.

The query string of a signed URL, and a password before a host, let anybody read the file. So the
program works with addresses, and a source's full URL is added again where the file is opened.
"""

import re

_FLAGS = re.IGNORECASE | re.DOTALL


def _before_query(part: str) -> str:
    """A pattern of URLs before http://…?anything and …://…?name=value.

    Elsewhere a question mark may be part of a glob.
    """
    scheme = r"(?<![\w+.-])[a-z][\w+.-]*"
    return rf"(?:https?://{part}*(?=\?)|{scheme}://{part}*(?=\?[\w.~%-]+=))"


_SIGNED = re.compile(rf"(.*?{_before_query('[^?]')})\?.*", _FLAGS)
# In a text, a URL ends at a space or a quote, and before the text's own punctuation.
_PART = r"""[^\s?'"<>]"""
_END = r"""[^\s'"<>]*?(?=[]:;,.)]*(?:[\s'"<>]|$))"""
_IN_TEXT = re.compile(rf"({_before_query(_PART)})\?{_END}", _FLAGS)
EXPECTED = "expected a path or URL without query string and password"
_PASSWORD = re.compile(r"""(://)[^\s/?:@'"]*:[^\s/?@'"]*@""")
_FROM_SCHEME = re.compile(r"[a-z][\w+.-]*://.*", _FLAGS)

_full_urls: dict[str, str] = {}  # Address -> the URL of a source, as given.


def address(value: str) -> str:
    """A path, URL, or source as in --source, without query string and password."""
    match = _SIGNED.fullmatch(value)
    return _PASSWORD.sub(r"\1", match[1] if match else value)


def is_signed(value: str) -> bool:
    """Whether a path, URL or source holds more than an address."""
    return address(value) != value


def remember(source: str) -> str:
    """The address of a source, whose full URL this process then opens."""
    shown = address(source)
    url, full = _FROM_SCHEME.search(shown), _FROM_SCHEME.search(source)
    if shown != source and url and full:
        _full_urls[url[0]] = full[0]
    return shown


def full(url: str) -> str:
    """The URL by which a file is opened."""
    return _full_urls.get(url, url)


def without_secrets(text: str) -> str:
    """A text in which each URL is an address."""
    for short, url in _full_urls.items():
        text = text.replace(url, short)
        if query := url.partition("?")[2]:
            text = text.replace(f"?{query}", "")
    return _PASSWORD.sub(r"\1", _IN_TEXT.sub(r"\1", text))
