"""Files of a knowledge base as text with a structure: paragraphs, table rows, question-answer pairs, headings, pages.

`read_document` is the only door; the suffix chooses the reader. Every block is a span of the document's text, so that a
citation can point at the very characters.
"""

import io
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.common.files import format_size

LARGEST_FILE = 200 * 10**6  # bytes; larger ones are refused rather than read for hours
# docx, pptx and xlsx are ZIP archives. Real ones unpack to at most some ten times their size.
LARGEST_UNPACKED = 10**9
LARGEST_RATIO = 200
PLAIN_HEADING = re.compile(r"^(第[一二三四五六七八九十百零\d]+[章节篇部]|[一二三四五六七八九十]+、)\s*\S{0,40}$")
QUESTION = re.compile(r"^\s*(?:问|Q|Question)\s*[:：]\s*", re.IGNORECASE)
ANSWER = re.compile(r"^\s*(?:答|A|Answer)\s*[:：]\s*", re.IGNORECASE)
CJK = r"\u3000-\u303f\u3400-\u9fff\uf900-\ufaff\uff00-\uffef"
# Every PDF library ends a Chinese sentence at the visual line; a line goes on where both sides are CJK.
BROKEN_LINE = re.compile(rf"(?<=[{CJK}])(?<![。！？；：])[ \t]*\n[ \t]*(?=[{CJK}])")


@dataclass(frozen=True)
class Block:
    """A span of a document that is not put together with others of another kind.

    Attributes:
        start, end: span in the document's text, in characters.
        kind: `text` may be joined with its neighbours and cut at sentence ends; `row` (of a table, with its header) and
            `pair` (a question with its answer) stand alone.
        heading: the headings above it, outermost first.
        page: page of a PDF or slide, from 1; None elsewhere.
    """

    start: int
    end: int
    kind: str
    heading: tuple[str, ...] = ()
    page: int | None = None


@dataclass(frozen=True)
class Document:
    """A file's text, its blocks in reading order, and what was noticed on the way (scans, a guessed encoding)."""

    title: str
    text: str
    blocks: tuple[Block, ...]
    notices: tuple[str, ...] = ()


@dataclass
class _Builder:
    """Collects blocks; `headings` is the path of headings at the current place, by level."""

    title: str
    parts: list[str] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    headings: dict[int, str] = field(default_factory=dict)
    length: int = 0

    def put(self, text: str, kind: str = "text", page: int | None = None) -> None:
        """Adds a block; blank ones are left out."""
        text = clean(text)
        if not text:
            return
        if self.parts:
            self.parts.append("\n")
            self.length += 1
        self.parts.append(text)
        heading = tuple(self.headings[level] for level in sorted(self.headings))
        self.blocks.append(Block(self.length, self.length + len(text), kind, heading, page))
        self.length += len(text)

    def put_heading(self, level: int, text: str) -> None:
        """From here on `text` stands above the blocks; headings of its level and below end."""
        self.headings = {other: value for other, value in self.headings.items() if other < level}
        if text := " ".join(clean(text).split()):
            self.headings[level] = text

    def put_table(self, rows: Iterable[Sequence[str]], page: int | None = None) -> None:
        """Adds each row below the first as `header：cell；header：cell`."""
        rows = iter(rows)
        header = [cell.strip() for cell in next(rows, ())]
        for row in rows:
            self.put(describe_row(header, row), "row", page)

    def finish(self) -> Document:
        return Document(self.title, "".join(self.parts), tuple(self.blocks), tuple(self.notices))


def clean(text: str) -> str:
    """Line ends of one kind, no NUL bytes, no blanks around; the text itself is not altered."""
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "").strip()


def describe_row(header: Sequence[str], row: Sequence[str]) -> str:
    """`名称：妙蛙种子；属性：草、毒`; empty cells are left out."""
    cells = [(name, str(cell).strip()) for name, cell in zip([*header, *[""] * len(row)], row)]
    return "；".join(f"{name}：{cell}" if name else cell for name, cell in cells if cell)


def decode(data: bytes, builder: _Builder) -> str:
    """Text of a file whose encoding is not known; a guess is noticed.

    Raises:
        UserError: the bytes are no text.
    """
    if b"\0" in data[:4096] and not data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError("it is a binary file")
    for encoding in ("utf-8-sig", "utf-16") if data.startswith((b"\xff\xfe", b"\xfe\xff")) else ("utf-8-sig",):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            pass
    from charset_normalizer import from_bytes

    best = from_bytes(data).best()
    if best is None:
        raise UserError("its encoding could not be told; save it as UTF-8")
    # The names of the Chinese national standards are nested: the largest decodes what the smaller ones do.
    encoding = "gb18030" if best.encoding in ("gb2312", "gbk", "gb18030", "hz") else best.encoding
    builder.notices.append(f"read as {encoding}, which is a guess; save it as UTF-8 to be sure")
    return data.decode(encoding)


def read_document(path: Path) -> Document:
    """Reads a file of a knowledge base.

    Raises:
        UserError: the file cannot be read; the message says why, without its name.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"files of this kind are not read; known are {', '.join(sorted(READERS))}")
    size = path.stat().st_size
    if size == 0:
        raise UserError("it is empty (0 bytes)")
    if size > LARGEST_FILE:
        raise UserError(f"it has {format_size(size)}; files of up to {format_size(LARGEST_FILE)} are read, split it")
    data = path.read_bytes()
    builder = _Builder(title=path.stem)
    try:
        if path.suffix.lower() in (".docx", ".pptx", ".xlsx"):
            check_archive(data)
        reader(builder, data)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a parser meets a broken file in its own way
        raise UserError(f"it is damaged or not what its name says ({type(error).__name__}: {error})") from error
    document = builder.finish()
    if not document.blocks:
        raise UserError("; ".join(builder.notices) or "there is no text in it")
    return document


def check_archive(data: bytes) -> None:
    """Refuses an office file that would unpack to far more than real ones do.

    Raises:
        UserError: it is no archive, or a bomb.
    """
    try:
        unpacked = sum(entry.file_size for entry in zipfile.ZipFile(io.BytesIO(data)).infolist())
    except zipfile.BadZipFile:
        if data.startswith(b"\xd0\xcf\x11\xe0"):
            raise UserError("it is encrypted, or of Office before 2007; save it anew without a password") from None
        raise UserError("it is damaged: office files are ZIP archives, and this is none") from None
    if unpacked > LARGEST_UNPACKED or unpacked > LARGEST_RATIO * len(data) + 10**7:
        raise UserError(f"it would unpack from {format_size(len(data))} to {format_size(unpacked)}: a ZIP bomb")


def read_plain(builder: _Builder, data: bytes) -> None:
    """Paragraphs of plain text: headings such as 第一章, pairs of 问： and 答：, else lines up to a blank one."""
    put_plain(builder, decode(data, builder))


def put_plain(builder: _Builder, text: str, page: int | None = None) -> None:
    """Adds plain text; see `read_plain`."""
    lines = clean(text).split("\n")
    collected: list[str] = []
    is_pair = False

    def flush() -> None:
        nonlocal is_pair
        builder.put("\n".join(collected), "pair" if is_pair else "text", page)
        collected.clear()
        is_pair = False

    for line in lines:
        if PLAIN_HEADING.match(line.strip()):
            flush()
            builder.put_heading(1 if line.strip().startswith("第") else 2, line)
        elif not line.strip():
            if not (is_pair and not any(ANSWER.match(each) for each in collected)):
                flush()
        elif QUESTION.match(line):
            flush()
            is_pair = True
            collected.append(line)
        else:
            collected.append(line)
    flush()


def read_markdown(builder: _Builder, data: bytes) -> None:
    """Blocks of CommonMark with tables; code is kept as it stands."""
    from markdown_it import MarkdownIt

    text = clean(decode(data, builder))
    lines = text.split("\n")
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    row: list[str] = []
    rows: list[list[str]] = []
    depth = 0
    for place, token in enumerate(tokens):
        if token.type == "heading_open":
            builder.put_heading(int(token.tag[1]), tokens[place + 1].content)
        elif token.type == "table_open":
            rows, depth = [], depth + 1
        elif token.type == "table_close":
            builder.put_table(rows)
            depth -= 1
        elif token.type == "tr_open":
            row = []
        elif token.type == "tr_close":
            rows.append(row)
        elif token.type == "inline" and depth:
            row.append(token.content)
        elif token.type == "inline" and tokens[place - 1].type != "heading_open":
            put_plain(builder, token.content)
        elif token.type in ("fence", "code_block"):
            builder.put("\n".join(lines[slice(*token.map)]))


def read_html(builder: _Builder, data: bytes) -> None:
    """What a reader sees of a page: scripts, styles, navigation and hidden elements are left out."""
    from bs4 import BeautifulSoup
    from bs4.element import NavigableString, Tag

    soup = BeautifulSoup(data, "html.parser")
    for element in soup(["script", "style", "noscript", "template", "nav", "iframe", "svg"]):
        element.decompose()
    for element in soup.find_all(attrs={"hidden": True}):
        element.decompose()
    if soup.title and soup.title.get_text(strip=True):
        builder.title = soup.title.get_text(" ", strip=True)
        soup.title.decompose()
    blocks = {
        "p",
        "li",
        "dd",
        "dt",
        "pre",
        "blockquote",
        "figcaption",
        "td",
        "div",
        "section",
        "article",
        "body",
        "main",
    }

    def walk(element: Tag, collected: list[str]) -> None:
        for child in element.children:
            if isinstance(child, Tag) and re.fullmatch("h[1-6]", child.name):
                flush(collected)
                builder.put_heading(int(child.name[1]), child.get_text(" ", strip=True))
            elif isinstance(child, Tag) and child.name == "table":
                flush(collected)
                cells = [[cell.get_text(" ", strip=True) for cell in row(["td", "th"])] for row in child("tr")]
                builder.put_table(cells)
            elif isinstance(child, Tag) and child.name == "br":
                collected.append("\n")
            elif isinstance(child, Tag):
                if child.name in blocks:
                    flush(collected)
                walk(child, collected)
                if child.name in blocks:
                    flush(collected)
            elif type(child) is NavigableString:
                collected.append(re.sub(r"\s+", " ", str(child)))

    def flush(collected: list[str]) -> None:
        builder.put("".join(collected))
        collected.clear()

    rest: list[str] = []
    walk(soup, rest)
    flush(rest)


def read_pdf(builder: _Builder, data: bytes) -> None:
    """Pages of a PDF; lines that a page's width has broken are joined. Pages without text are scans."""
    import logging

    from pypdf import PdfReader

    logging.getLogger("pypdf").setLevel(logging.ERROR)
    reader = PdfReader(io.BytesIO(data))
    if reader.is_encrypted and not reader.decrypt(""):
        raise UserError("it is encrypted; save it without a password")
    scans = []
    for number, page in enumerate(reader.pages, 1):
        text = BROKEN_LINE.sub("", clean(page.extract_text() or ""))
        if text:
            put_plain(builder, text, number)
        elif "/XObject" in (page.get("/Resources") or ()) and not put_scan(builder, page, number):
            scans.append(number)
    if scans:
        some = ", ".join(map(str, scans[:10])) + (" …" if len(scans) > 10 else "")
        builder.notices.append(
            f"{len(scans)} of {len(reader.pages)} pages are scans without text (page {some}); "
            "pip install rapidocr onnxruntime reads them"
        )


def put_scan(builder: _Builder, page: Any, number: int) -> bool:
    """Reads the pictures of a page where the optional rapidocr is installed; returns whether it is."""
    try:
        from rapidocr import RapidOCR
    except ImportError:
        return False
    engine = RapidOCR()
    for image in page.images:
        found = engine(image.data)
        builder.put("\n".join(found.txts or ()), "text", number)
    return True


def read_docx(builder: _Builder, data: bytes) -> None:
    """Paragraphs, headings by their styles, and tables of a Word document, in order."""
    import docx
    from docx.table import Table

    for part in docx.Document(io.BytesIO(data)).iter_inner_content():
        if isinstance(part, Table):
            builder.put_table([[cell.text for cell in row.cells] for row in part.rows])
            continue
        style = part.style.name if part.style is not None else ""
        if found := re.match(r"(?:Heading|标题) ?(\d)", style or ""):
            builder.put_heading(int(found[1]), part.text)
        elif style == "Title":
            builder.title = part.text.strip() or builder.title
        else:
            put_plain(builder, part.text)


def read_pptx(builder: _Builder, data: bytes) -> None:
    """Slides: their titles are headings, their numbers pages; notes are read too."""
    from pptx import Presentation

    for number, slide in enumerate(Presentation(io.BytesIO(data)).slides, 1):
        title = slide.shapes.title
        builder.put_heading(1, title.text if title is not None else "")
        for shape in slide.shapes:
            if shape.has_table:
                builder.put_table([[cell.text for cell in row.cells] for row in shape.table.rows], number)
            elif shape.has_text_frame and shape != title:
                builder.put(shape.text_frame.text, "text", number)
        if slide.has_notes_slide:
            builder.put(slide.notes_slide.notes_text_frame.text, "text", number)


def read_xlsx(builder: _Builder, data: bytes) -> None:
    """Every sheet's rows; the sheet's name is the heading."""
    import pandas

    for sheet, frame in pandas.read_excel(io.BytesIO(data), sheet_name=None, dtype=str, header=None).items():
        builder.put_heading(1, str(sheet))
        builder.put_table(frame.fillna("").itertuples(index=False, name=None))


def read_csv(builder: _Builder, data: bytes) -> None:
    """Rows of a table separated by commas, tabs or semicolons."""
    import csv

    text = decode(data, builder)
    first = text.partition("\n")[0]
    separator = max(",\t;", key=first.count)
    builder.put_table(csv.reader(io.StringIO(text, newline=""), delimiter=separator))


def read_json(builder: _Builder, data: bytes) -> None:
    """Records of JSON or JSON lines: questions with answers are pairs, other objects rows."""
    text = decode(data, builder)
    try:
        records = json.loads(text)
    except ValueError:
        records = [json.loads(line) for line in text.splitlines() if line.strip()]
    for record in records if isinstance(records, list) else [records]:
        put_record(builder, record)


PAIRS = (("question", "answer"), ("instruction", "output"), ("prompt", "response"), ("问题", "答案"), ("问", "答"))


def put_record(builder: _Builder, record: Any) -> None:
    """Adds one JSON value; see `read_json`."""
    if not isinstance(record, dict):
        builder.put(record if isinstance(record, str) else json.dumps(record, ensure_ascii=False), "row")
        return
    for question, answer in PAIRS:
        if isinstance(record.get(question), str) and isinstance(record.get(answer), str):
            builder.put(f"问：{record[question]}\n答：{record[answer]}", "pair")
            return
    messages = record.get("conversations") or record.get("messages")
    if isinstance(messages, list):
        said = [message.get("content") or message.get("value") for message in messages if isinstance(message, dict)]
        builder.put("\n".join(str(each) for each in said if each), "pair")
        return
    cells = [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in record.values()]
    builder.put(describe_row(list(record), cells), "row")


READERS: dict[str, Callable[[_Builder, bytes], None]] = {
    ".txt": read_plain,
    ".md": read_markdown,
    ".markdown": read_markdown,
    ".html": read_html,
    ".htm": read_html,
    ".pdf": read_pdf,
    ".docx": read_docx,
    ".pptx": read_pptx,
    ".xlsx": read_xlsx,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".json": read_json,
    ".jsonl": read_json,
}


def find_files(paths: Sequence[Path]) -> Iterator[Path]:
    """The readable files among `paths` and below folders, sorted; hidden ones and links out of a folder are left out.

    Raises:
        UserError: a path that was named does not exist or is neither file nor folder.
    """
    seen: set[Path] = set()
    for path in paths:
        if path.is_file():
            found = [path]
        elif path.is_dir():
            root = path.resolve()
            inside = (each for each in sorted(path.rglob("*")) if each.suffix.lower() in READERS and each.is_file())
            found = [
                each
                for each in inside
                if not any(part.startswith(".") for part in each.relative_to(path).parts)
                and each.resolve().is_relative_to(root)
            ]
        else:
            raise UserError(f"{path} {'is no file and no folder' if path.exists() else 'does not exist'}")
        for each in found:
            if each.resolve() not in seen:
                seen.add(each.resolve())
                yield each
