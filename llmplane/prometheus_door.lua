-- Port 15090: metrics of requests are shown by their own names and labels, without Envoy's prefix.
--
-- Envoy puts `envoy_` in front of every name. Ours have the mark `llmx_` behind it (translator.metrics). Names
-- stand at the beginnings of lines only; what looks like one in the value of a label stays. Buckets are
-- shown as they were written: 0.1, not 0.10000000000000001.
--
-- Envoy has neighbouring labels as one, which costs a request less: `llmx_A="A=1<US>B?=<US>C@=A<US>"` is shown as
-- `A="1",B="unknown",C="1"` (<US>: the byte 31; `?`: nothing is shown as unknown; `@`: as the label of that name).
-- Names with `__ms` behind them are histograms in milliseconds, to be shown in seconds.

local MARK = "envoy_llmx_"

local function short(number) return ('le="%.12g"'):format(tonumber(number)) end

-- Values are escaped already, and stay so.
local function unpacked(labels)
  local shown, values = {}, {}
  for name, kind, value in labels:gmatch("([%w_]+)([?@]?)=([^\31]*)\31") do
    if kind == "@" then
      value = values[value]
    elseif kind == "?" and value == "" then
      value = "unknown"
    end
    values[name] = value
    shown[#shown + 1] = name .. '="' .. value .. '"'
  end
  return table.concat(shown, ",")
end

local function seconds(milliseconds) return ("%.12g"):format(tonumber(milliseconds) / 1000) end

local function in_seconds(name, what, labels, value)
  if what == "_sum" then
    value = seconds(value)
  elseif what == "_bucket" then
    labels = labels:gsub('le="([%d.e+]+)"$', function(bound) return 'le="' .. seconds(bound) .. '"' end)
  end
  return "\n" .. MARK .. name .. what .. "{" .. labels .. "} " .. value
end

local function renamed(lines, known)
  if not lines:find(MARK, 1, true) then return lines end
  local text = "\n" .. lines
  if text:find("__ms", 1, true) then
    text = text:gsub("\n# TYPE envoy_llmx_([%w_]+)__ms ", "\n# TYPE envoy_llmx_%1 ")
    text = text:gsub("\nenvoy_llmx_([%w_]-)__ms(_%l+){([^\n]*)} ([^\n]*)", in_seconds)
  end
  text = text:gsub("\nenvoy_llmx_", "\n"):gsub("\n# TYPE envoy_llmx_", "\n# TYPE ")
  text = text:gsub('([{,])llmx_[%w_]+="([^\n]-\31)"', function(before, labels)
    known[labels] = known[labels] or unpacked(labels)
    return before .. known[labels]
  end)
  text = text:gsub('le="(%d+%.%d%d%d%d%d%d%d%d%d+)"', short)
  return text:sub(2)
end

function envoy_on_response(handle)
  handle:headers():remove("content-length")
  local held, last = "", nil
  local known = {} -- labels of this page: a histogram has them in some 20 lines
  for chunk in handle:bodyChunks() do
    last = chunk
    local size = chunk:length()
    local text = held .. (size > 0 and chunk:getBytes(0, size) or "")
    local cut = text:match("^.*()\n") or 0 -- a line may go on in the next chunk
    held = text:sub(cut + 1)
    chunk:setBytes(renamed(text:sub(1, cut), known))
  end
  if last and held ~= "" then
    local size = last:length()
    last:setBytes((size > 0 and last:getBytes(0, size) or "") .. renamed(held, known))
  end
end
